"""A published KL autoencoder, held fixed, for generators to work in the latents of.

Paper: https://arxiv.org/abs/2112.10752.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, dtype

from mm.errors import ConfigError
from mm.systems.settings import SystemSettings
from mm.tokenizers.library_vae import LibraryVae, LibraryVaeConfig, build_library_vae
from mm.types import Batch, Losses, System


class PublishedVaeConfig(SystemSettings):
    """A published KL autoencoder.

    Args:
        vae: The network, in its publisher's terms.
    """

    name: Literal["published-vae"] = "published-vae"
    vae: LibraryVaeConfig

    @property
    def picture_side(self) -> int:
        return self.vae.image_size

    @property
    def text_limits(self) -> None:
        return None


class PublishedVae(System):
    """Encodes and decodes with a published network; it is not trained here.

    Args:
        vae: Pictures to latents and back.
    """

    def __init__(self, vae: LibraryVae) -> None:
        super().__init__()
        self.vae = vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `mm.types.Compresses`."""
        return self.vae.latent_shape

    def to_latents(self, image: Tensor) -> Tensor:
        """See `mm.types.Compresses`."""
        return self.vae.to_latents(image)

    def from_latents(self, latents: Tensor) -> Tensor:
        """See `mm.types.Compresses`."""
        return self.vae.from_latents(latents)

    def cast_(self, dtype: dtype) -> None:
        """Stays in fp32: in half precision pictures of published networks overflow or lose their finest shades."""

    def loss(self, batch: Batch, step: int) -> Losses:
        """There is none. Raises `ConfigError`."""
        raise ConfigError("a published autoencoder is held fixed; train one of your own with configs/vq.yaml")


def build(config: PublishedVaeConfig, parts: Mapping[str, Any] | None = None) -> PublishedVae:
    """Build the network with fresh weights, to be filled with the published ones."""
    return PublishedVae(build_library_vae(config.vae))
