"""`/v1/audit`: who changed what, from where and when."""

from datetime import datetime
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from server.api.route import StrictRoute
from server.requests.state import State
from vectors.library.audit.log import Wanted

router = APIRouter(prefix="/v1/audit", tags=["admin"], route_class=StrictRoute)
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=0, lt=2**62)]
Word = Annotated[str, Field(max_length=200)]


class AuditRecord(BaseModel):
    number: int = Field(description="1 for the first of the library, then without gaps.")
    at: datetime
    action: str = Field(description="preset.create, say. One that failed after it was recorded has a second record, "
                        "whose action ends with .failed.")
    target: str
    before: Any = Field(description="What it was; values that take more than 16 KiB are told by their SHA-256.")
    after: Any = Field(description="What it became.")
    key_id: str | None = Field(description="Null: the key of the settings, or the server itself.")
    key_name: str
    tenant: str
    address: str = Field(description="Where the request came from; of requests of a batch, the batch.")
    request_id: str
    previous: Digest = Field(description="Digest of the record before.")
    digest: Digest = Field(description="SHA-256 of all other fields as JSON, with sorted keys and no spaces.")


class AuditHead(BaseModel):
    number: int
    digest: str


class AuditPage(BaseModel):
    data: list[AuditRecord]
    head: AuditHead = Field(description="The newest record of all. Noted elsewhere, it shows later whether the records "
                            "up to it are still those that they were.")


class AuditVerdict(BaseModel):
    """What a check of the chain found."""

    whole: bool
    fault: str | None = Field(description="The first thing that is wrong.")
    records: int
    first: int | None
    last: int | None
    head: str = Field(description="Digest of the last record.")


class AuditQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: Number | None = Field(default=None, description="Records with larger numbers, the oldest first.")
    before: Number | None = Field(default=None, description="Records with smaller numbers, the newest first.")
    action: Word | None = Field(default=None, description="An action, or all that begin so: preset.")
    target: Word | None = None
    tenant: Word | None = None
    key_id: Word | None = None
    request_id: Word | None = None
    since: AwareDatetime | None = None
    limit: int = Field(default=100, ge=1, le=500)


class VerifyQuery(BaseModel):
    """number, digest: of a record that was noted before, which has to be there still."""

    model_config = ConfigDict(extra="forbid")

    number: Number | None = None
    digest: Digest | None = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.number is None) != (self.digest is None):
            raise ValueError("number and digest belong together")
        return self


@router.get("")
def list_audit(query: Annotated[AuditQuery, Query()], state: State) -> AuditPage:
    """Records of the audit, the newest first where `after` is not given."""
    found = state.library.audit.list(Wanted(**query.model_dump()))
    number, digest = state.library.audit.head()
    return AuditPage(data=[AuditRecord.model_validate(vars(record)) for record in found],
                     head=AuditHead(number=number, digest=digest))


@router.get("/verify")
def verify_audit(query: Annotated[VerifyQuery, Query()], state: State) -> AuditVerdict:
    """Read the whole chain and check it."""
    known = None if query.number is None or query.digest is None else (query.number, query.digest)
    found = state.library.audit.verify(known)
    return AuditVerdict(whole=found.fault is None, fault=found.fault, records=found.records, first=found.first,
                        last=found.last, head=found.head)
