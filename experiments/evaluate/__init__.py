"""``python -m experiments evaluate``: attacks on a model of Hugging Face, on texts of your own.

==================  ====================================================================================
module              what it holds
==================  ====================================================================================
``data``            texts: prompts with what the adversary writes of them, and responses
``encoding``        their tokens: which are open to attack and which are scored; batches
``models``          the model, its tokenizer and its own replies
``page``            what was found, as a page
``command``         the command
==================  ====================================================================================
"""
