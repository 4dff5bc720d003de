"""The arithmetic of each foreign scheme as its authors have it: what the values of a conversion are held against."""
