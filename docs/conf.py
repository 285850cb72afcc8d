"Sphinx settings for the site that `docs/build.py` stages from the notebooks"

project, author, html_title = "rtdetr_kd", "the rtdetr_kd authors", "rtdetr_kd"
copyright = "2026 onwards, the rtdetr_kd authors"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"  # tables that a notebook shows as Markdown
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]
pygments_dark_style = "github-dark"
highlight_language = "text"  # a fence without a language is a drawing, or what was printed
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_copy_source = html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = dict(
    light_css_variables={"color-brand-primary": "#2f5d8a", "color-brand-content": "#2f5d8a"},
    dark_css_variables={"color-brand-primary": "#8ab8e6", "color-brand-content": "#8ab8e6"},
)
