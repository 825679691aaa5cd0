"""The rehearsal: everything that stands in for what a developer's machine lacks, built from the Debian archive and PyPI."""
