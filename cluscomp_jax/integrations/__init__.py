"""What the extension points of other libraries take. Each file needs its library, and is imported by its own name."""
