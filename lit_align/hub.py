"""Uploads an exported model to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # type: ignore[reportPrivateImportUsage]  # httpx's, of the version that the hub's client uses
    LocalTokenNotFoundError,
)

from lit_align.errors import UserError, first_line


def push(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Upload a folder as a model, which is made if it does not exist; gives its address.

    Args:
        name: The model's name: USER/NAME, or NAME for the user who is logged in.
        private: Make a new model private; an existing one keeps its visibility.

    Raises:
        UserError: the hub refuses it, or cannot be reached.
    """
    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model aligned with lit_align")
    except HFValidationError as error:
        raise UserError(f"export: --push-to-hub={name} must be USER/NAME or NAME: {first_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise UserError("export: --push-to-hub needs a token. Set HF_TOKEN, or run: hf auth login") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        fix = " Set HF_TOKEN to a token that may write, or run: hf auth login" if status in (401, 403) else ""
        raise UserError(f"export: --push-to-hub={name}: the hub answers {first_line(error)}.{fix}") from error
    except ValueError as error:  # of the hub's check of the card
        raise UserError(f"export: --push-to-hub={name}: {' '.join(str(error).split())}. Change README.md.") from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"export: --push-to-hub={name}: the hub cannot be reached: {first_line(error)}. Run it again later."
        ) from error
    return str(made)
