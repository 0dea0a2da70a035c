"""The page and the pictures behind `python -m bench.report`, drawn from committed rows.

==============  ===============================================================================
module          what it holds
==============  ===============================================================================
``sources``     rows with their files and lines; what repeats what; machines and versions in words
``panels``      what a page is made of, and the parts of a plot
``sections``    time and memory against S, ratios, rates, errors
``sweeps``      time against other sizes
``readme``      the table of a step's costs, in README and on the page
``memory``      the table of peak memory, in docs/memory.md
``evidence``    the experiments' results
``page``        one HTML file of all that, from ``page.html``, ``page.css`` and ``page.js``
==============  ===============================================================================

The pictures are :mod:`..benchmarks.plot`'s.
"""
