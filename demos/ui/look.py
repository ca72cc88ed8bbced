"""The look of the page: system fonts, one accent, room for the content, one column on a phone."""

from gradio.themes import Base

TITLE = "mm: pictures and words"
HEADER = """
<header class="head">
  <h1>mm <span>pictures and words</span></h1>
  <p>Small models, trained from scratch on emoji by independent artists: they name pictures, find them, describe them and
  paint them. The drawings here are by an artist whom none of them has seen. Everything is computed on this machine.</p>
</header>
"""

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]

CSS = """
.gradio-container { width: 100%; min-width: 0; max-width: 1120px !important; margin: 0 auto !important; }
.head { padding: 1.2rem 0 .4rem; }
.head h1 { font-size: 1.9rem; font-weight: 750; letter-spacing: -.02em; margin: 0; }
.head h1 span { font-weight: 400; opacity: .6; margin-left: .35rem; }
.head p { margin: .5rem 0 0; max-width: 46rem; line-height: 1.5; opacity: .8; }
.lead { opacity: .8; }
.picture img { object-fit: contain; }
.painting img { width: 100%; height: 100%; object-fit: contain; }
.found .grid-wrap { min-height: 0; max-height: none; }
.found .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)) !important;
  grid-template-rows: none !important;
}
.found .thumbnail-lg img { padding-bottom: 2.4rem; }
.found .caption-label { left: 0; right: 0; max-width: 100%; border: 0; text-align: center; white-space: normal; }
.heat .grid-container { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)) !important; }
footer .divider { display: none; }
.gallery-item .container.gallery { width: 4.7rem; height: 4.7rem; }
.wrap > .error { font-size: 0; }
.wrap > .error::after { content: "Please see the message above"; font-size: .95rem; }
.asked { align-items: flex-end; }
.bars, .bars * { font-family: inherit; }
@media (min-width: 900px) { .way { min-height: 8.5rem; } }
@media (max-width: 640px) {
  .head h1 { font-size: 1.5rem; }
  .head h1 span { display: block; margin: .1rem 0 0; font-size: 1.1rem; }
}
"""


def theme() -> Base:
    """Fonts of the system alone: the page asks no other server for anything."""
    return Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=FONTS,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(block_shadow="none", block_border_width="1px", body_background_fill="*neutral_50", block_label_text_weight="600")
