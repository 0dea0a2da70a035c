"""The demonstration, `python -m demo`, in two parts: a pretrained policy, and a small model trained from scratch."""
