"""Views, figures and the report page."""
