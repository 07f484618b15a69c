"""One file per rule; each returns its findings for one page size and one loader."""
