"""``report.html`` and the files beside it: the tables, pictures and settings of an evaluation to read and to send."""
