"""Reading and writing of weight files, without running code from them."""
