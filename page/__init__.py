"""What `app.py` is made of: `studio` (requests to portraits), `views` (results to HTML), `page.css`."""
