"""Sphinx settings of the site. Owner, address and version come from settings.ini; the chapters are read from nbs/ as they are."""
import configparser, importlib.util, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
import nbdev_sphinx  # noqa: E402  beside this file

settings = configparser.ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
lib, git_url = settings["lib_name"], settings["git_url"]
index = ROOT / lib / "_modidx.py"  # written by nbdev_export

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax", "sphinx.ext.githubpages",
              "sphinx_design", "sphinx_togglebutton", "sphinx_copybutton", "nbdev_sphinx"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
exclude_patterns = ["**/.ipynb_checkpoints", "**/_*.ipynb"]
nbdev_syms = nbdev_sphinx.load_syms(index)
nbdev_api = nbdev_sphinx.write_api(index, ROOT / settings["nbs_path"] / "api")  # ignored by git

nb_execution_mode = "off"  # the committed outputs are shown
nb_ipywidgets_js = {}  # else pages with widgets ask two other hosts
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "attrs_block", "alert", "tasklist"]
myst_heading_anchors = 4
myst_dmath_allow_digits = True
myst_dmath_double_inline = True  # $$ in the middle of a paragraph, as Jupyter allows it
mathjax_path = "mathjax/tex-chtml-full.js"  # put there by get_mathjax.sh and served by the site itself
mathjax3_config = {"tex": {"packages": {"[-]": ["noerrors", "noundefined"]}}, "options": {"enableMenu": False}}  # bad TeX shows as an error

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
autodoc_mock_imports = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"(?!{lib}\.).*|.*\._\w+")]  # our public names must be found; other projects' lists of names would need a network

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_baseurl = settings["doc_host"] + settings["doc_baseurl"] + "/"
togglebutton_hint = "Show"
html_theme_options = dict(
    repository_url=git_url, repository_branch=settings["branch"], path_to_docs=settings["nbs_path"], use_repository_button=True,
    use_issues_button=True, use_source_button=True, use_download_button=True, show_toc_level=2, home_page_in_toc=True,
    show_navbar_depth=2, navbar_persistent=[])
