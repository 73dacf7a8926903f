"""Two arms that differ in random-LTD alone, and how they are compared."""
