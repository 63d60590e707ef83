"""Results as tables and as an HTML page."""
