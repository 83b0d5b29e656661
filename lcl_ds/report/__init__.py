"""Pages for people: the report of a run and the page of a batch."""
