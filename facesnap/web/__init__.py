"""The page and its API: `server` puts it together over a loaded pipeline. Nothing below imports Gradio."""
