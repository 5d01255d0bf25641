/*
 * A PKCS#11 module that plays a smart card under OpenSC, over SoftHSM. Tests only.
 *
 * Most functions are SoftHSM's own. Those below behave as a SmartCard-HSM does where that differs, and fail on command.
 * Commands are lines NAME=VALUE in the file named by $CARD_CONTROL. It is read at every call, so that a test can switch
 * while a process has the module loaded:
 *
 *   backing=PATH         SoftHSM
 *   length_query=0       the length query of C_Decrypt is free (default 1: it costs an operation, as under OpenSC)
 *   wedge=0              a failed C_Decrypt leaves its session usable (default 1: CKR_OPERATION_ACTIVE from then on)
 *   suffix=0             the token's label is as given (default 1: " (UserPIN)" is appended)
 *   mechanisms=raw       OAEP is neither announced nor done
 *   raw=number           CKM_RSA_X_509 gives a number, without leading zeros (default: as long as the modulus)
 *   oaep=sha1            OAEP with SHA-256 is refused, as SoftHSM does (default: done here, as OpenSC does on the host)
 *   tries=N              how many wrong PINs lock the token (default 3)
 *   delay_ms=N           a private-key operation takes that long
 *   lost_write=1         C_CreateObject says OK; this process sees the object, no other one ever does
 *   deauth=N             a new N: another process selected the applet. Decryption recovers in silence; creating and
 *                        destroying are refused, or with deauth_writes=lost answered OK and not done
 *   present=0            the token is away
 *   epoch=N, loss=KIND   a new N: the token went away in this manner, and perhaps came back:
 *                          card     out of its reader; a slot call mends
 *                          reader   with its reader; a slot call mends, if some call was made while it was away
 *                          pcscd    pcscd was started anew; a slot call mends
 *                          command  in the middle of a command; only C_Finalize and C_Initialize mend
 *   fail.FUNC=0xRV       FUNC returns RV and does nothing
 *   freeze.FUNC=1        FUNC does not return while this line is there; freeze.card=1: all that talk to the card;
 *                        freeze.C_Login_answer=1: C_Login does its work and does not return
 *   crash.FUNC=1         FUNC aborts the process; crash_once.FUNC=1: the first call among all processes
 *
 * It writes $CARD_CONTROL.calls, a line for each call of a function below, "operation" for each private-key operation
 * that the card performs, "wrong PIN" for each that it rejects and "C_Login_answer" for each that it has checked; and
 * keeps the tries left in $CARD_CONTROL.tries.
 */
#define CK_PTR *
#define CK_DEFINE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION(type, name) type name
#define CK_DECLARE_FUNCTION_POINTER(type, name) type (*name)
#define CK_CALLBACK_FUNCTION(type, name) type (*name)
#ifndef NULL_PTR
#define NULL_PTR 0
#endif
#include "pkcs11.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static CK_FUNCTION_LIST card;             /* what the caller gets */
static CK_FUNCTION_LIST_PTR hsm;          /* SoftHSM */
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;

static long seen_epoch, seen_deauth;      /* as of C_Initialize, or mended since; guarded by mu, as all below */
static int noticed;                       /* a call was made while the token was away */
typedef struct {
	CK_SESSION_HANDLE of[4096];
	int count;
} sessions;
static sessions wedged;                   /* a failed decryption left them unusable */
static sessions ours;                     /* an OAEP decryption is under way that SoftHSM does not do */
static sessions bare;                     /* a bare RSA operation is under way whose answer is a number */

/* ---- control and counters ---- */

/*
 * The text of the control file as it is now. A file that was not replaced is not read again: reading it a dozen times took
 * longer than all else but the operation itself. The caller holds control_mu.
 */
static pthread_mutex_t control_mu = PTHREAD_MUTEX_INITIALIZER;
static char control[8192];
static struct stat control_seen;

static const char *control_text(void)
{
	struct stat now;
	const char *path = getenv("CARD_CONTROL");
	if (!path || stat(path, &now) != 0) {
		memset(&control_seen, 0, sizeof control_seen);
		return "";
	}
	if (now.st_dev == control_seen.st_dev && now.st_ino == control_seen.st_ino && now.st_size == control_seen.st_size &&
	    memcmp(&now.st_mtim, &control_seen.st_mtim, sizeof now.st_mtim) == 0 &&
	    memcmp(&now.st_ctim, &control_seen.st_ctim, sizeof now.st_ctim) == 0)
		return control;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, control, sizeof control - 1);
	if (n < 0 || n == sizeof control - 1 || fstat(fd, &control_seen) != 0)
		abort();
	close(fd);
	control[n] = 0;
	return control;
}

/* The value of a command as it is now, or otherwise. The caller owns out. */
static const char *command(const char *name, const char *otherwise, char *out, size_t size)
{
	size_t length = strlen(name);
	const char *value = otherwise;
	pthread_mutex_lock(&control_mu);
	for (const char *line = control_text(); *line; line += strcspn(line, "\n"), line += *line == '\n') {
		if (strncmp(line, name, length) == 0 && line[length] == '=') {
			line += length + 1;
			snprintf(out, size, "%.*s", (int)strcspn(line, "\n"), line);
			value = out;
		}
	}
	pthread_mutex_unlock(&control_mu);
	return value;
}

static long number(const char *name, long otherwise)
{
	char out[64];
	const char *value = command(name, NULL, out, sizeof out);
	return value ? strtol(value, NULL, 0) : otherwise;
}

static int is(const char *name, const char *wanted)
{
	char out[64];
	return strcmp(command(name, "", out, sizeof out), wanted) == 0;
}

/* Whether FAULT.FUNC is commanded. */
static long fault(const char *kind, const char *func)
{
	char name[128];
	snprintf(name, sizeof name, "%s.%s", kind, func);
	return number(name, 0);
}

static int open_beside(const char *suffix, int flags)
{
	char path[512];
	snprintf(path, sizeof path, "%s%s", getenv("CARD_CONTROL"), suffix);
	return open(path, flags | O_CLOEXEC, 0600);
}

static void note(const char *what)
{
	static int fd = -1;
	static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
	char line[128];
	int n = snprintf(line, sizeof line, "%s\n", what);
	pthread_mutex_lock(&opening);
	if (fd < 0)
		fd = open_beside(".calls", O_WRONLY | O_CREAT | O_APPEND);
	pthread_mutex_unlock(&opening);
	if (fd < 0 || write(fd, line, n) != n) /* one write, so lines of several threads and processes do not mix */
		abort();
}

/* Adds change to the tries left, or restores them where change is 0. Returns what is left. */
static long tries(int change)
{
	char text[16] = "";
	long left = number("tries", 3);
	int fd = open_beside(".tries", O_RDWR | O_CREAT);
	if (fd < 0 || flock(fd, LOCK_EX) != 0)
		abort();
	if (change != 0) {
		if (read(fd, text, sizeof text - 1) > 0)
			left = strtol(text, NULL, 10);
		left += change;
		if (left < 0)
			left = 0;
	}
	int n = snprintf(text, sizeof text, "%ld\n", left);
	if (ftruncate(fd, 0) != 0 || pwrite(fd, text, n, 0) != n)
		abort();
	close(fd);
	return left;
}

static long tries_left(void)
{
	char text[16] = "";
	long left = number("tries", 3);
	int fd = open_beside(".tries", O_RDONLY);
	if (fd < 0)
		return left;
	if (read(fd, text, sizeof text - 1) > 0)
		left = strtol(text, NULL, 10);
	close(fd);
	return left;
}

/* ---- what every function does first ---- */

static CK_RV enter(const char *func, int talks_to_card)
{
	note(func);
	if (fault("crash", func))
		abort();
	if (fault("crash_once", func)) {
		int fd = open_beside(".crashed", O_WRONLY | O_CREAT | O_EXCL);
		if (fd >= 0)
			abort();
	}
	while (fault("freeze", func) || (talks_to_card && fault("freeze", "card")))
		usleep(5000);
	return (CK_RV)fault("fail", func);
}

#define ENTER(func, talks_to_card)                              \
	do {                                                    \
		CK_RV entered = enter(#func, talks_to_card);    \
		if (entered != CKR_OK)                          \
			return entered;                         \
	} while (0)

/* What a function that needs the card returns now. */
static CK_RV presence(void)
{
	CK_RV rv = CKR_OK;
	pthread_mutex_lock(&mu);
	int present = number("present", 1) != 0;
	if (number("epoch", 0) != seen_epoch) {
		if (!present)
			noticed = 1;
		if (is("loss", "card"))
			rv = CKR_DEVICE_REMOVED;
		else if (is("loss", "reader") && noticed)
			rv = present ? CKR_DEVICE_REMOVED : CKR_TOKEN_NOT_PRESENT;
		else
			rv = CKR_GENERAL_ERROR;
	} else if (!present) {
		rv = CKR_TOKEN_NOT_PRESENT;
	}
	pthread_mutex_unlock(&mu);
	return rv;
}

/* Whether log-in and old sessions still seem to be there although the token was away: nobody noticed. */
static int unnoticed(void)
{
	pthread_mutex_lock(&mu);
	int yes = number("epoch", 0) != seen_epoch && ((is("loss", "reader") && !noticed) || is("loss", "command"));
	pthread_mutex_unlock(&mu);
	return yes;
}

/* A slot call mends some losses: all sessions end, and with them the log-in. */
static void mend(void)
{
	CK_SLOT_ID slots[64];
	CK_ULONG count = 64;
	pthread_mutex_lock(&mu);
	long epoch = number("epoch", 0);
	if (epoch != seen_epoch) {
		if (number("present", 1) == 0)
			noticed = 1;
		if (!is("loss", "command") && (!is("loss", "reader") || noticed)) {
			if (hsm->C_GetSlotList(CK_TRUE, slots, &count) == CKR_OK)
				for (CK_ULONG i = 0; i < count; i++)
					hsm->C_CloseAllSessions(slots[i]);
			seen_epoch = epoch;
			noticed = 0;
			wedged.count = ours.count = bare.count = 0;
		}
	}
	pthread_mutex_unlock(&mu);
}

/* One private-key operation of the card. */
static CK_RV operate(void)
{
	CK_RV rv = presence();
	if (rv != CKR_OK)
		return rv;
	note("operation");
	usleep(1000 * number("delay_ms", 0));
	rv = presence(); /* it may have gone meanwhile */
	if (rv == CKR_OK) {
		pthread_mutex_lock(&mu);
		seen_deauth = number("deauth", 0); /* OpenSC verifies again with its cached PIN */
		pthread_mutex_unlock(&mu);
	}
	return rv;
}

/* What a writing function returns where another process deauthenticated the card; *lost where it says OK and lies. */
static CK_RV may_write(int *lost)
{
	CK_RV rv = presence();
	*lost = number("lost_write", 0) != 0;
	pthread_mutex_lock(&mu);
	if (rv == CKR_OK && number("deauth", 0) != seen_deauth) {
		if (is("deauth_writes", "lost"))
			*lost = 1;
		else
			rv = CKR_USER_NOT_LOGGED_IN;
	}
	pthread_mutex_unlock(&mu);
	return rv;
}

/* ---- sets of sessions ---- */

static int drop(sessions *set, CK_SESSION_HANDLE s)
{
	int found = 0;
	pthread_mutex_lock(&mu);
	for (int i = 0; i < set->count; i++)
		if (set->of[i] == s) {
			set->of[i--] = set->of[--set->count];
			found = 1;
		}
	pthread_mutex_unlock(&mu);
	return found;
}

static void add(sessions *set, CK_SESSION_HANDLE s)
{
	drop(set, s);
	pthread_mutex_lock(&mu);
	if (set->count == sizeof set->of / sizeof *set->of)
		abort();
	set->of[set->count++] = s;
	pthread_mutex_unlock(&mu);
}

static int has(sessions *set, CK_SESSION_HANDLE s)
{
	int found = 0;
	pthread_mutex_lock(&mu);
	for (int i = 0; i < set->count; i++)
		found |= set->of[i] == s;
	pthread_mutex_unlock(&mu);
	return found;
}

/* ---- the functions ---- */

static CK_RV card_Initialize(CK_VOID_PTR args)
{
	ENTER(C_Initialize, 0);
	CK_RV rv = hsm->C_Initialize(args);
	if (rv == CKR_OK) {
		pthread_mutex_lock(&mu);
		seen_epoch = number("epoch", 0);
		seen_deauth = number("deauth", 0);
		noticed = wedged.count = ours.count = bare.count = 0;
		pthread_mutex_unlock(&mu);
	}
	return rv;
}

static CK_RV card_Finalize(CK_VOID_PTR args)
{
	ENTER(C_Finalize, 0);
	return hsm->C_Finalize(args);
}

static CK_RV card_GetSlotList(CK_BBOOL present, CK_SLOT_ID_PTR slots, CK_ULONG_PTR count)
{
	ENTER(C_GetSlotList, 0);
	mend();
	if (number("present", 1) == 0 && (present || !is("loss", "card"))) {
		*count = 0;
		return CKR_OK;
	}
	return hsm->C_GetSlotList(present, slots, count);
}

static CK_RV card_GetSlotInfo(CK_SLOT_ID slot, CK_SLOT_INFO_PTR info)
{
	ENTER(C_GetSlotInfo, 0);
	mend();
	CK_RV rv = hsm->C_GetSlotInfo(slot, info);
	if (rv == CKR_OK && number("present", 1) == 0)
		info->flags &= ~(CK_FLAGS)CKF_TOKEN_PRESENT;
	return rv;
}

static CK_RV card_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info)
{
	static const char suffix[] = " (UserPIN)";
	ENTER(C_GetTokenInfo, 0);
	pthread_mutex_lock(&mu);
	int cached = number("epoch", 0) != seen_epoch;
	pthread_mutex_unlock(&mu);
	if (!cached && number("present", 1) == 0)
		return CKR_TOKEN_NOT_PRESENT;
	CK_RV rv = hsm->C_GetTokenInfo(slot, info);
	if (rv != CKR_OK || !(info->flags & CKF_TOKEN_INITIALIZED))
		return rv;
	long left = tries_left();
	info->flags &= ~(CK_FLAGS)(CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY | CKF_USER_PIN_LOCKED);
	if (left == 0)
		info->flags |= CKF_USER_PIN_LOCKED;
	else if (left == 1)
		info->flags |= CKF_USER_PIN_FINAL_TRY;
	else if (left < number("tries", 3))
		info->flags |= CKF_USER_PIN_COUNT_LOW;
	if (number("suffix", 1)) {
		size_t end = sizeof info->label;
		while (end > 0 && info->label[end - 1] == ' ')
			end--;
		size_t room = sizeof info->label - end, want = sizeof suffix - 1;
		memcpy(info->label + end, suffix, want < room ? want : room);
	}
	return CKR_OK;
}

static const CK_MECHANISM_TYPE announced[] = {
	CKM_RSA_PKCS_OAEP, /* the first: left out of a list of raw ones */
	CKM_RSA_X_509, CKM_RSA_PKCS, CKM_RSA_PKCS_KEY_PAIR_GEN, CKM_EC_KEY_PAIR_GEN, CKM_ECDH1_DERIVE, CKM_ECDSA,
};

static CK_RV card_GetMechanismList(CK_SLOT_ID slot, CK_MECHANISM_TYPE_PTR list, CK_ULONG_PTR count)
{
	ENTER(C_GetMechanismList, 0);
	(void)slot;
	CK_ULONG skip = is("mechanisms", "raw") ? 1 : 0, n = sizeof announced / sizeof *announced - skip, room = *count;
	*count = n;
	if (!list)
		return CKR_OK;
	if (room < n)
		return CKR_BUFFER_TOO_SMALL;
	memcpy(list, announced + skip, n * sizeof *list);
	return CKR_OK;
}

static CK_RV known_mechanism(CK_MECHANISM_TYPE type)
{
	for (CK_ULONG i = is("mechanisms", "raw") ? 1 : 0; i < sizeof announced / sizeof *announced; i++)
		if (announced[i] == type)
			return CKR_OK;
	return CKR_MECHANISM_INVALID;
}

static CK_RV card_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info)
{
	ENTER(C_GetMechanismInfo, 0);
	CK_RV rv = known_mechanism(type);
	return rv == CKR_OK ? hsm->C_GetMechanismInfo(slot, type, info) : rv;
}

static CK_RV card_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR app, CK_NOTIFY notify, CK_SESSION_HANDLE_PTR s)
{
	ENTER(C_OpenSession, 0);
	if (number("present", 1) == 0)
		return CKR_TOKEN_NOT_PRESENT;
	return hsm->C_OpenSession(slot, flags, app, notify, s);
}

static CK_RV card_CloseSession(CK_SESSION_HANDLE s)
{
	ENTER(C_CloseSession, 0);
	drop(&wedged, s);
	drop(&ours, s);
	drop(&bare, s);
	return hsm->C_CloseSession(s);
}

static CK_RV card_CloseAllSessions(CK_SLOT_ID slot)
{
	ENTER(C_CloseAllSessions, 0);
	pthread_mutex_lock(&mu);
	wedged.count = ours.count = bare.count = 0;
	pthread_mutex_unlock(&mu);
	return hsm->C_CloseAllSessions(slot);
}

static CK_RV card_Login(CK_SESSION_HANDLE s, CK_USER_TYPE user, CK_UTF8CHAR_PTR pin, CK_ULONG length)
{
	ENTER(C_Login, 1);
	if (unnoticed())
		return CKR_USER_ALREADY_LOGGED_IN;
	CK_RV rv = presence();
	if (rv != CKR_OK)
		return rv;
	if (user != CKU_USER)
		return hsm->C_Login(s, user, pin, length);
	if (length < 6 || length > 15)
		return CKR_PIN_LEN_RANGE;
	if (tries_left() == 0)
		return CKR_PIN_LOCKED;
	rv = hsm->C_Login(s, user, pin, length);
	if (rv == CKR_PIN_INCORRECT) {
		note("wrong PIN");
		if (tries(-1) == 0)
			rv = CKR_PIN_LOCKED;
	} else if (rv == CKR_OK) {
		tries(0);
		pthread_mutex_lock(&mu);
		seen_deauth = number("deauth", 0);
		pthread_mutex_unlock(&mu);
	}
	/* For a death between the token's answer and whoever waits for it. */
	note("C_Login_answer");
	while (fault("freeze", "C_Login_answer"))
		usleep(5000);
	return rv;
}

static CK_RV card_Logout(CK_SESSION_HANDLE s)
{
	ENTER(C_Logout, 0);
	return hsm->C_Logout(s);
}

static CK_RV card_InitPIN(CK_SESSION_HANDLE s, CK_UTF8CHAR_PTR pin, CK_ULONG length)
{
	ENTER(C_InitPIN, 1);
	CK_RV rv = hsm->C_InitPIN(s, pin, length);
	if (rv == CKR_OK)
		tries(0);
	return rv;
}

static CK_RV card_SetPIN(CK_SESSION_HANDLE s, CK_UTF8CHAR_PTR old, CK_ULONG old_length, CK_UTF8CHAR_PTR pin, CK_ULONG length)
{
	ENTER(C_SetPIN, 1);
	CK_RV rv = presence();
	if (rv != CKR_OK)
		return rv;
	if (length < 6 || length > 15)
		return CKR_PIN_LEN_RANGE;
	if (tries_left() == 0)
		return CKR_PIN_LOCKED;
	rv = hsm->C_SetPIN(s, old, old_length, pin, length);
	if (rv == CKR_PIN_INCORRECT) {
		note("wrong PIN");
		if (tries(-1) == 0)
			rv = CKR_PIN_LOCKED;
	} else if (rv == CKR_OK) {
		tries(0);
	}
	return rv;
}

static CK_RV card_FindObjectsInit(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR template, CK_ULONG count)
{
	ENTER(C_FindObjectsInit, 0); /* OpenSC answers from its cache */
	return hsm->C_FindObjectsInit(s, template, count);
}

static CK_RV card_GetAttributeValue(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE object, CK_ATTRIBUTE_PTR template, CK_ULONG count)
{
	ENTER(C_GetAttributeValue, 0);
	return hsm->C_GetAttributeValue(s, object, template, count);
}

static CK_RV card_SetAttributeValue(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE object, CK_ATTRIBUTE_PTR template, CK_ULONG count)
{
	ENTER(C_SetAttributeValue, 1);
	(void)s, (void)object, (void)template, (void)count;
	return CKR_ARGUMENTS_BAD; /* what OpenSC says to a new CKA_VALUE; sometimes a crash follows */
}

/* Makes an object that only this process sees: a session object in a session that nobody closes. */
static CK_RV pretend(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR template, CK_ULONG count, CK_OBJECT_HANDLE_PTR object)
{
	CK_BBOOL no = CK_FALSE;
	CK_ATTRIBUTE copy[32];
	CK_SESSION_INFO info;
	CK_SESSION_HANDLE own;
	if (count > sizeof copy / sizeof *copy)
		return CKR_ARGUMENTS_BAD;
	memcpy(copy, template, count * sizeof *copy);
	for (CK_ULONG i = 0; i < count; i++)
		if (copy[i].type == CKA_TOKEN)
			copy[i].pValue = &no;
	CK_RV rv = hsm->C_GetSessionInfo(s, &info);
	if (rv == CKR_OK)
		rv = hsm->C_OpenSession(info.slotID, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &own);
	return rv == CKR_OK ? hsm->C_CreateObject(own, copy, count, object) : rv;
}

static CK_RV card_CreateObject(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR template, CK_ULONG count, CK_OBJECT_HANDLE_PTR object)
{
	int lost;
	ENTER(C_CreateObject, 1);
	CK_RV rv = may_write(&lost);
	if (rv != CKR_OK)
		return rv;
	for (CK_ULONG i = 0; i < count; i++)
		if (template[i].type == CKA_VALUE && template[i].ulValueLen == 0)
			return CKR_ARGUMENTS_BAD;
	return lost ? pretend(s, template, count, object) : hsm->C_CreateObject(s, template, count, object);
}

static CK_RV card_DestroyObject(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE object)
{
	int lost;
	ENTER(C_DestroyObject, 1);
	CK_RV rv = may_write(&lost);
	if (rv != CKR_OK || lost)
		return rv;
	return hsm->C_DestroyObject(s, object);
}

/*
 * OAEP with SHA-256 and an empty label (RFC 8017, 7.1.2), which SoftHSM does not know: the block as the raw operation
 * gives it becomes the message, hashed by SoftHSM in a session that has nothing else to do. Not in constant time.
 */
static CK_RV sha256(CK_SESSION_HANDLE s, CK_BYTE *in, CK_ULONG length, CK_BYTE digest[32])
{
	CK_MECHANISM mechanism = {CKM_SHA256, NULL, 0};
	CK_ULONG n = 32;
	CK_RV rv = hsm->C_DigestInit(s, &mechanism);
	return rv == CKR_OK ? hsm->C_Digest(s, in, length, digest, &n) : rv;
}

/* Adds the mask that MGF1 makes of a seed. */
static CK_RV mask(CK_SESSION_HANDLE s, const CK_BYTE *seed, CK_ULONG seed_length, CK_BYTE *data, CK_ULONG length)
{
	CK_BYTE counted[1024 + 4], digest[32];
	memcpy(counted, seed, seed_length);
	memset(counted + seed_length, 0, 4);
	for (CK_ULONG i = 0; i < length; i++) {
		if (i % 32 == 0) {
			counted[seed_length + 3] = (CK_BYTE)(i / 32);
			CK_RV rv = sha256(s, counted, seed_length + 4, digest);
			if (rv != CKR_OK)
				return rv;
		}
		data[i] ^= digest[i % 32];
	}
	return CKR_OK;
}

static CK_RV unpad(CK_SESSION_HANDLE s, CK_BYTE *block, CK_ULONG size, CK_BYTE_PTR out, CK_ULONG_PTR out_length)
{
	CK_BYTE nothing = 0, label[32], *seed = block + 1, *data = block + 33;
	CK_ULONG length = size - 33, i = 32;
	CK_RV rv = mask(s, data, length, seed, 32);
	if (rv == CKR_OK)
		rv = mask(s, seed, 32, data, length);
	if (rv == CKR_OK)
		rv = sha256(s, &nothing, 0, label);
	if (rv != CKR_OK)
		return rv;
	while (i < length && data[i] == 0)
		i++;
	if (block[0] != 0 || memcmp(data, label, 32) != 0 || i == length || data[i] != 1)
		return CKR_ENCRYPTED_DATA_INVALID;
	if (*out_length < length - i - 1)
		return CKR_BUFFER_TOO_SMALL;
	*out_length = length - i - 1;
	memcpy(out, data + i + 1, *out_length);
	return CKR_OK;
}

static CK_RV init_oaep(CK_SESSION_HANDLE s, CK_RSA_PKCS_OAEP_PARAMS *params, CK_OBJECT_HANDLE key)
{
	CK_MECHANISM raw = {CKM_RSA_X_509, NULL, 0};
	/* A source of 0 is how pkcs11-tool says that there is no label. */
	if (params->mgf != CKG_MGF1_SHA256 || params->source > CKZ_DATA_SPECIFIED || params->ulSourceDataLen != 0)
		return CKR_MECHANISM_PARAM_INVALID;
	CK_RV rv = hsm->C_DecryptInit(s, &raw, key);
	if (rv == CKR_OK)
		add(&ours, s);
	return rv;
}

static CK_RV decrypt_oaep(CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG in_length, CK_BYTE_PTR out, CK_ULONG_PTR out_length)
{
	CK_BYTE block[1024];
	CK_ULONG n = sizeof block;
	if (!out) {
		add(&ours, s); /* the operation goes on after a length query */
		*out_length = in_length;
		return CKR_OK;
	}
	CK_RV rv = hsm->C_Decrypt(s, in, in_length, block, &n);
	if (rv != CKR_OK)
		return rv;
	if (n != in_length || n < 66)
		return CKR_ENCRYPTED_DATA_INVALID;
	return unpad(s, block, n, out, out_length);
}

static CK_RV card_DecryptInit(CK_SESSION_HANDLE s, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
	ENTER(C_DecryptInit, 0);
	if (has(&wedged, s))
		return CKR_OPERATION_ACTIVE;
	CK_RV rv = known_mechanism(mechanism->mechanism);
	CK_RSA_PKCS_OAEP_PARAMS *params = mechanism->pParameter;
	if (rv == CKR_OK && mechanism->mechanism == CKM_RSA_PKCS_OAEP && params->hashAlg == CKM_SHA256 && !is("oaep", "sha1"))
		rv = init_oaep(s, params, key);
	else if (rv == CKR_OK)
		rv = hsm->C_DecryptInit(s, mechanism, key);
	if (rv == CKR_OK && mechanism->mechanism == CKM_RSA_X_509 && is("raw", "number"))
		add(&bare, s);
	return rv == CKR_OBJECT_HANDLE_INVALID ? CKR_KEY_HANDLE_INVALID : rv;
}

static CK_RV card_Decrypt(CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG in_length, CK_BYTE_PTR out, CK_ULONG_PTR out_length)
{
	ENTER(C_Decrypt, 1);
	CK_RV rv = CKR_OK;
	int oaep = drop(&ours, s);
	if (out || number("length_query", 1))
		rv = operate();
	if (rv == CKR_OK && oaep)
		rv = decrypt_oaep(s, in, in_length, out, out_length);
	else if (rv == CKR_OK)
		rv = hsm->C_Decrypt(s, in, in_length, out, out_length);
	if (drop(&bare, s) && rv == CKR_OK && out) {
		CK_ULONG zeros = 0;
		while (zeros < *out_length && !out[zeros])
			zeros++;
		*out_length -= zeros;
		memmove(out, out + zeros, *out_length);
	}
	if (rv == CKR_GENERAL_ERROR && presence() == CKR_OK)
		rv = CKR_ENCRYPTED_DATA_INVALID; /* SoftHSM's word for a block that does not decrypt */
	if (rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL && number("wedge", 1))
		add(&wedged, s);
	return rv;
}

static CK_RV card_DeriveKey(CK_SESSION_HANDLE s, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE base, CK_ATTRIBUTE_PTR template,
			    CK_ULONG count, CK_OBJECT_HANDLE_PTR key)
{
	ENTER(C_DeriveKey, 1);
	CK_RV rv = operate();
	return rv == CKR_OK ? hsm->C_DeriveKey(s, mechanism, base, template, count, key) : rv;
}

static CK_RV card_GenerateKeyPair(CK_SESSION_HANDLE s, CK_MECHANISM_PTR mechanism, CK_ATTRIBUTE_PTR public, CK_ULONG public_count,
				  CK_ATTRIBUTE_PTR private, CK_ULONG private_count, CK_OBJECT_HANDLE_PTR public_key,
				  CK_OBJECT_HANDLE_PTR private_key)
{
	int lost;
	ENTER(C_GenerateKeyPair, 1);
	CK_RV rv = may_write(&lost);
	if (rv == CKR_OK)
		rv = hsm->C_GenerateKeyPair(s, mechanism, public, public_count, private, private_count, public_key, private_key);
	return rv;
}

static CK_RV card_GenerateRandom(CK_SESSION_HANDLE s, CK_BYTE_PTR out, CK_ULONG length)
{
	ENTER(C_GenerateRandom, 1);
	CK_RV rv = presence();
	return rv == CKR_OK ? hsm->C_GenerateRandom(s, out, length) : rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
	char path[512];
	CK_RV (*get)(CK_FUNCTION_LIST_PTR_PTR);
	if (!getenv("CARD_CONTROL"))
		return CKR_GENERAL_ERROR; /* the test did not pass the variable on to this process */
	ENTER(C_GetFunctionList, 0);
	if (!hsm) {
		void *lib = dlopen(command("backing", "", path, sizeof path), RTLD_NOW | RTLD_LOCAL);
		get = lib ? (CK_RV(*)(CK_FUNCTION_LIST_PTR_PTR))dlsym(lib, "C_GetFunctionList") : NULL;
		if (!get || get(&hsm) != CKR_OK)
			return CKR_GENERAL_ERROR;
		card = *hsm;
		card.C_GetFunctionList = C_GetFunctionList;
#define OVERRIDE(name) card.C_##name = card_##name
		OVERRIDE(Initialize);
		OVERRIDE(Finalize);
		OVERRIDE(GetSlotList);
		OVERRIDE(GetSlotInfo);
		OVERRIDE(GetTokenInfo);
		OVERRIDE(GetMechanismList);
		OVERRIDE(GetMechanismInfo);
		OVERRIDE(OpenSession);
		OVERRIDE(CloseSession);
		OVERRIDE(CloseAllSessions);
		OVERRIDE(Login);
		OVERRIDE(Logout);
		OVERRIDE(InitPIN);
		OVERRIDE(SetPIN);
		OVERRIDE(FindObjectsInit);
		OVERRIDE(GetAttributeValue);
		OVERRIDE(SetAttributeValue);
		OVERRIDE(CreateObject);
		OVERRIDE(DestroyObject);
		OVERRIDE(DecryptInit);
		OVERRIDE(Decrypt);
		OVERRIDE(DeriveKey);
		OVERRIDE(GenerateKeyPair);
		OVERRIDE(GenerateRandom);
	}
	*list = &card;
	return CKR_OK;
}
