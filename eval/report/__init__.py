"""Reports: tables, plots and pages, from records alone."""
