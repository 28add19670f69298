"""A control that is not in the package, in one file, and the run that has it."""
