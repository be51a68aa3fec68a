"""What the records say, written as Markdown, HTML and plots.

page          the report as a whole, and the order of its sections
findings      what the sections are written from
setting       what differs from the papers
verdicts      claims, line by line, and trends
by_fit        teachers, and scores by how well they fit the data
tables        all results
by_seconds    scores by the seconds that they took
provenance    what was chosen on validation concepts, and what it took
cells         numbers as texts
curves        the plots
document      headings, paragraphs, tables and plots, as Markdown and as HTML
"""
