"""The compiled workers: all that needs numba, which is an extra, `qconvert[cpu]`."""
