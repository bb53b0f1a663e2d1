"""An artifact against what its program means, and a table against its schedule."""
