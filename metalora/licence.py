"""What the licence of a base wants to be said by what is made with it."""

from __future__ import annotations

FLUX_DEV = "FLUX.1-dev"
# The notice that section 3 of the FLUX.1 [dev] Non-Commercial License wants with every derivative, word for word.
FLUX_NOTICE = (
    "The FLUX.1 [dev] Model is licensed by Black Forest Labs. Inc. under the FLUX.1 [dev] Non-Commercial License. Copyright Black Forest Labs. Inc. "
    "IN NO EVENT SHALL BLACK FOREST LABS, INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR "
    "OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL."
)
FLUX_TERMS = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"


def is_hub_id(name: str) -> bool:
    """Whether a repository on the Hub may be called so: owner/model."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def is_flux_dev(base: str) -> bool:
    """Whether a base, by the name that users know, is FLUX.1-dev; fine-tunes under other names are for their makers to say."""
    return base.partition("@")[0].rstrip("/").endswith(FLUX_DEV)


def header(base: str) -> dict[str, str]:
    """What goes into the header of a LoRA file."""
    return {"license": f"{FLUX_NOTICE} Terms: {FLUX_TERMS}."} if is_flux_dev(base) else {}


def front_matter(base: str, own: str = "other") -> str:
    """The lines about the licence in the head of a card, and about the base, where it is one of the Hub: the Hub takes no other name there."""
    repo = base.partition("@")[0]
    of_base = f"\nbase_model: {repo}" if is_hub_id(repo) else ""
    lines = f"license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: {FLUX_TERMS}" if is_flux_dev(base) else f"license: {own}"
    return lines + of_base


def notice(base: str) -> str:
    """The section about the licence in a card; nothing for a base that wants none."""
    return f"\n## Licence of the base\n\n{FLUX_NOTICE}\n\nThe terms are at {FLUX_TERMS}; they bind whoever uses this too.\n" if is_flux_dev(base) else ""
