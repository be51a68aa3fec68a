"""The report of a reproduction, written from its records as Markdown, HTML and plots.

page          the report, and the order of its sections
report_data   the plan, the claims and the results that the sections read
setting       section: differences from the papers
verdicts      section: claims, line by line, and trends
by_fit        section: teachers, and scores against how well they fit the data
results       section: all results
by_seconds    section: scores against the seconds that they took
provenance    section: choices by validation, and costs
cells         numbers as texts
plots         the plots
document      headings, paragraphs, tables and figures, as Markdown and as HTML
"""
