"""Tests in guests: one pytest run per page size, results as they come, one report."""
