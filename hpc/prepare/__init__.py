"""Converters that write data sets: one kind of data a file, each mounted as `trireme prepare NAME`."""
