"""Reports a person looks at: one HTML file that needs nothing beside it, and a PNG of each of its figures."""
