"""A run that is disturbed again and again, and must end as if it had not been.

`events` draws what disturbs it, and when, from a seed. `cluster` is a Ray cluster of two nodes on this machine
whose processes can be killed. `trial` takes a run through its events and starts the driver anew whenever it has
ended. `dataset` has the images and what is compared, `tally` what it cost. `python -m chaos --seed 1 2 3`, with
`tests` on the path, prints a table.
"""
