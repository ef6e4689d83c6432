"""The command line: click commands, and the tables and progress bars they print."""
