"""The `aajr` command line. Nothing in the package imports it."""
