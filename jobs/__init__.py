"""The commands: each module is `python -m jobs.NAME`, and an entrypoint of `ray job submit`."""
