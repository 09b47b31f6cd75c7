"""The command line: parse, call one function, hand to report."""
