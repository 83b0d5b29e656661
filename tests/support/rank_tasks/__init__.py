"""What the ranks of the distributed tests do; each task gets its rank and a folder, and returns what torch can save."""
