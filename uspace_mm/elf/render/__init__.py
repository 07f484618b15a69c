"""One report, several renderings: text, JSON, SARIF, JUnit."""
