"""Everything that `make test` runs, and the unit tests of what belongs to no package."""
