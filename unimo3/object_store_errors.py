"""What an error of an object store means: whether another try may succeed, and else what to do.

The packages of the stores raise errors of their own libraries. Their HTTP status, the store's code and the kind of the
error decide; none of these libraries is imported here.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html for the codes; RFC 9110, section 15, for the
statuses.
"""

import re
import ssl
import sys
from collections.abc import Iterator

# Package and credentials, by scheme. Others are named by fsspec.
_S3 = ("'unimo3[s3]'", "AWS_PROFILE and ~/.aws, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
_GCS = ("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login")
_AZURE = ("adlfs", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN")
_STORES = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS, "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE}

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_INVALID = frozenset(
    {"InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidAuthenticationInfo"}
)
# Statuses of 4xx that another try may not meet, and codes of such statuses.
_PASSING_STATUSES = (408, 409, 425, 429)
_PASSING_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "ServiceUnavailable", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
)
# Errors of credentials that are found before anything is sent.
_CREDENTIAL_ERRORS = {
    "botocore.exceptions": (
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
        "SSOError",
        "TokenRetrievalError",
        "NoAuthTokenError",
    ),
    "google.auth.exceptions": ("DefaultCredentialsError", "RefreshError"),
    "azure.core.exceptions": ("ClientAuthenticationError",),
}
_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError, RuntimeError)


def is_expired(error: BaseException) -> bool:
    """Whether the store refuses credentials that it accepted before."""
    return any(_code(each) in _EXPIRED for each in _chain(error))


def permanent_problem(error: Exception, scheme: str) -> str | None:
    """What is wrong and what to do, where another try cannot succeed; None: it may.

    Args:
        scheme: of the store's URL, such as ``s3``.

    Raises:
        Exception: the error itself, if only a bug raises such a one.
    """
    chain = list(_chain(error))
    message = plain_message(error)
    package, credentials = _STORES.get(scheme, ("", "those of the store's package"))
    codes = {_code(each) for each in chain}
    status = status_of(error)
    if isinstance(error, ImportError):
        return f"its package is not installed ({message}); " + (f"pip install {package}" if package else "install it")
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in chain):
        return f"the store's certificate is not trusted ({message}); for s3:, let AWS_CA_BUNDLE name its authority's"
    if codes & _EXPIRED:
        return f"the credentials expired ({message}); renew them ({credentials}) and start the same command again"
    if codes & _INVALID:
        return f"the store does not accept the credentials ({message}); fix them ({credentials})"
    if any(_is_credential_error(each) for each in chain):
        return f"no usable credentials ({message}); set them ({credentials})"
    if codes & _PASSING_CODES or isinstance(error, TimeoutError) or status in _PASSING_STATUSES:
        return None
    if status == 401:
        return f"the store does not accept the credentials ({message}); renew them ({credentials})"
    if isinstance(error, FileNotFoundError) or status == 404:
        return f"no such bucket or object ({message}); fix the URL, create the bucket, or copy what is missing there"
    if status == 403 or (isinstance(error, PermissionError) and not status):
        return (
            f"access is denied, or there is no such bucket ({message}); let the credentials ({credentials}) read and "
            "list it, and write it where it is written"
        )
    if isinstance(error, NotADirectoryError | IsADirectoryError) or 300 <= status < 500:
        return f"the store answers {status or 'an error'} ({message}); fix the URL, the region or the endpoint"
    if isinstance(error, _BUGS) and type(error).__module__ == "builtins":
        raise error
    if type(error) is ValueError:  # of options that do not fit together, such as an endpoint that is no URL
        return f"cannot be opened ({message}); fix the endpoint and the options in the store's environment and files"
    return None


def status_of(error: BaseException) -> int:
    """The HTTP status that an error came from; 0: from none."""
    return next((status for each in _chain(error) if (status := _status(each))), 0)


def plain_message(error: BaseException) -> str:
    """The first line of an error, or of the one it came from, without the user and the password of a URL in it."""
    texts = [str(each).strip() for each in _chain(error)]
    line = next((text.splitlines()[0] for text in texts if text), type(error).__name__)
    return re.sub(r"(?<=//)[^/\s]*@", "...", line)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _code(error: BaseException) -> str:
    """The store's code of an error: of botocore's, or of Azure's library."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "error_code", None) or "")


def _status(error: BaseException) -> int:
    """The HTTP status of an error, 0 if it has none."""
    if type(error).__module__ == "aiohttp.http_exceptions":
        return 0  # of an answer that cannot be parsed, such as one that was cut off; its code of 400 is aiohttp's
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for name in ("status", "status_code", "code"):
        status = status or getattr(error, name, None)
    return status if isinstance(status, int) and 100 <= status < 600 else 0


def _is_credential_error(error: BaseException) -> bool:
    for module, names in _CREDENTIAL_ERRORS.items():
        kinds = tuple(getattr(sys.modules[module], name, ()) for name in names) if module in sys.modules else ()
        if isinstance(error, kinds):
            return True
    return False
