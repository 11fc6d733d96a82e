"""The library as other libraries know models. Each module imports what it serves, and only when it is imported."""
