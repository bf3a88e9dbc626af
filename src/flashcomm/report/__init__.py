"""Figures as people see them: rows and tables, pages, pictures' colours, progress."""
