"""A hospital's data as they are: files, databases and images, read at the hospital alone."""
