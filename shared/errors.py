"""The one exception tree of tpserve.

Every error has a `code` for programs, an HTTP status for the gateway and a message for people that
names what was wrong, the value seen, the limit and what to do about it.
"""


class TpserveError(Exception):
    """Base of every error that a user or a client may see."""

    code = "internal_error"
    http_status = 500
    retry_after_s: float | None = None
    """When the same request may succeed, where that can be estimated."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(TpserveError):
    """A setting is unknown, malformed or out of range, or settings contradict each other."""

    code = "invalid_config"
    http_status = 400


class ModelError(TpserveError):
    """A model folder is missing, broken, or of a kind that is not supported."""

    code = "invalid_model"
    http_status = 400


class MemoryPlanError(TpserveError):
    """A model, or a step with it, does not fit into the memory that is free."""

    code = "out_of_memory"
    http_status = 507


class InvalidRequestError(TpserveError):
    """A request that cannot be understood, or has an unknown field or a value out of range."""

    code = "invalid_value"
    http_status = 400


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens do not fit into the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(TpserveError):
    """A request names a model that is not loaded."""

    code = "model_not_found"
    http_status = 404


class UnloadedError(TpserveError):
    """A job's model was unloaded before it had finished."""

    code = "model_unloaded"
    http_status = 503


class JobNotFoundError(TpserveError):
    """A request names a job that is not under way."""

    code = "not_found"
    http_status = 404


class SlowReaderError(TpserveError):
    """A client does not read its events, and too many wait for it."""

    code = "slow_reader"
    http_status = 408


class QueueFullError(TpserveError):
    """The bounded job queue has no room."""

    code = "queue_full"
    http_status = 429


class NotReadyError(TpserveError):
    """The server is starting, stopping, or replacing a worker."""

    code = "not_ready"
    http_status = 503


class WorkerLostError(TpserveError):
    """A worker process ended, or fell silent, and what needed it cannot go on."""

    code = "worker_lost"
    http_status = 503


class JobKillsWorkersError(TpserveError):
    """The workers were lost during a step of the job, and again during a step of it alone."""

    code = "job_kills_workers"
    http_status = 422  # clients send what gets a 5xx again by themselves


class CommError(WorkerLostError):
    """A collective failed; `rank` is the peer that did not answer or went away."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank


class DatabaseError(TpserveError):
    """The database of the sessions cannot do what was asked; nothing of it was stored."""

    code = "database_error"
    http_status = 503


class SessionsOffError(TpserveError):
    """The server was started without a database."""

    code = "sessions_off"
    http_status = 501


class SessionNotFoundError(TpserveError):
    """A request names a session, or a message of one, that is not there."""

    code = "session_not_found"
    http_status = 404


class SessionBusyError(TpserveError):
    """An answer is being written in the session."""

    code = "session_busy"
    http_status = 409


class JobsOffError(TpserveError):
    """The server was started without a database, so it keeps no jobs."""

    code = "jobs_off"
    http_status = 501


class JobExistsError(TpserveError):
    """There is a job with that id already, and it asks for something else."""

    code = "job_exists"
    http_status = 409


class ConnectionLostError(TpserveError):
    """A client cannot reach the server, or the server stopped answering."""

    code = "connection_lost"
    http_status = 503
