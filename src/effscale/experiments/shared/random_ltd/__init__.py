"""Two arms that differ only in random-LTD, and their comparison."""
