"""Draw the pictures of the documents: a question with the answer that a bundle gives, and the page of a profile.

python docs/pictures.py question build/trol-nano             -> docs/images/question.png
python docs/pictures.py profile build/profile/profile.html   -> docs/images/profile.png (needs `make browser`)
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import trol_edge

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SCENE = ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png"
QUESTION = "What is left of the red star?"
SCALE = 3  # the scene is 112 pixels wide
PAPER, INK, PALE, BLUE = "#ffffff", "#1f2328", "#656d76", "#0b5fc0"


def question(bundle: Path, output: Path) -> str:
    """Draw the shipped scene beside a question and the bundle's answer, which is returned."""
    with trol_edge.Runtime(bundle) as runtime:
        answer = str(runtime.generate(QUESTION, SCENE))
        model = runtime.bundle.manifest.model
    with Image.open(SCENE) as scene:
        picture = scene.convert("RGB").resize((SCALE * scene.width, SCALE * scene.height), Image.Resampling.LANCZOS)
    edge = 24
    card = Image.new("RGB", (picture.width + 560, picture.height + 2 * edge), PAPER)
    card.paste(picture, (edge, edge))
    draw = ImageDraw.Draw(card)
    left = picture.width + 3 * edge
    for y, text, size, color in (
        (96, QUESTION, 30, INK),
        (160, answer, 44, BLUE),
        (262, f"{model}, the small model that ships here, on a CPU", 18, PALE),
    ):
        draw.text((left, y), text, font=ImageFont.load_default(size), fill=color)
    draw.rectangle((0, 0, card.width - 1, card.height - 1), outline="#d0d7de")
    save(card, output, {"question": QUESTION, "answer": answer})
    return answer


def profile(page: Path, output: Path) -> None:
    """Take a picture of the upper part of a profile's page, as headless Chromium shows it."""
    from playwright.sync_api import sync_playwright

    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in browsers if (found := shutil.which(name))), None)
    with sync_playwright() as driver:
        # In a container neither the sandbox nor /dev/shm is what Chromium expects.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        tab = browser.new_page(viewport={"width": 1000, "height": 1295}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        browser.close()
    save(shot, output, {})


def save(picture: Image.Image, output: Path, texts: dict[str, str]) -> None:
    """Write a PNG of at most 256 colours, with texts in it that a test can read."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True, pnginfo=info)


def main() -> None:
    """Draw the picture that the command line names."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documents.")
    parser.add_argument("kind", choices=("question", "profile"))
    parser.add_argument("source", type=Path, help="bundle folder, or profile.html")
    given = parser.parse_args()
    output = IMAGES / f"{given.kind}.png"
    if given.kind == "question":
        print(question(given.source, output))
    else:
        profile(given.source, output)


if __name__ == "__main__":
    main()
