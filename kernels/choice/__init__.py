"""Which backend of an op runs: the rule, the measurements it looks at, and the checks that all ops share."""
