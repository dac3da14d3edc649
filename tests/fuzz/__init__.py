"""Random networks with faults planted in them, and a judge who knows the right numbers.

    PYTHONPATH=tests python -m fuzz               # 400 with plants, 400 without; a table by plant
    PYTHONPATH=tests python -m fuzz --only 17     # one network, all that was found about it

``grammar`` draws a network, a loss and a form of the data; ``plants`` puts a named fault in;
``truth`` differentiates the user's own objective twice, densely, in float64; ``judge`` runs
hesscli and compares. Truth never comes from hesscli.
"""
