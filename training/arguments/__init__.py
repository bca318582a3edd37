"""The command line: groups of arguments, each checked before anything slow begins."""
