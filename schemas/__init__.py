"""What everymask writes and reads: pyarrow schemas, one file each."""
