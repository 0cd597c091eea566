"""A run that is disturbed again and again, and must end as if it had not been.

    events.py    what disturbs a run, and when: drawn from a seed
    cluster.py   a Ray cluster of two nodes on this machine, whose processes can be killed
    trial.py     a run through its events, the driver started anew whenever it has ended
    tally.py     what it was and what it cost
    dataset.py   the images, the undisturbed run, and what is compared
    __main__.py  `python -m chaos --seed 1 2 3`, with `tests` on the path
"""
