"""Methods compared by the images that models generate on the embedded world."""
