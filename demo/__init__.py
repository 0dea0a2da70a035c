"""The two parts of `python -m demo`.

===========  ==========================================================================
module       what it does
===========  ==========================================================================
``data``     reads the plays, the injections and the pretrained model
``policy``   part (a): the pretrained policy, compared and adapted
``peers``    forward mode, finite differences and the float64 oracle, in plain PyTorch
``scratch``  part (b): training with and without the penalty, and the attack
``meter``    time and peak memory
``plots``    the pictures
``report``   tables and the HTML page
``run``      runs the parts under a progress display and saves everything
===========  ==========================================================================
"""
